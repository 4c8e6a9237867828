"""List the recipes that come with the package, or print one."""

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser

EXAMPLE = """\
example:
  freqfusion recipes
  freqfusion recipes camvid/segnext

A name of the list goes to --config of fit, validate, test and compare, in any folder; --model.network and
--model.fusion choose another size, backbone or fusion method.
"""
HEADER = ("name", "task", "network", "data set")


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("recipes", __doc__, EXAMPLE)
    parser.add_argument("name", nargs="?", help="a recipe to print")
    args = parser.parse_args(argv)
    require("yaml", "train")
    from freqfusion.cli._recipes import find_recipe, list_recipes, read_recipe

    if args.name is not None:
        try:
            print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        except ValueError as error:
            parser.error(str(error))
        return 0
    rows = [HEADER]
    for name, path in list_recipes().items():
        recipe = read_recipe(path)
        task = recipe.get("task", "semantic")
        model = recipe["model"]
        rows.append((name, task, model.get("network") or model["encoder"], recipe["data"]["dataset"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
