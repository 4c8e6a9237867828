"""Fusion methods on the maps of a frozen backbone with ImageNet weights, which are computed once for all runs.

example:
  python benchmarks/frozen.py camvid --root CAMVID --resize 180 240 --seeds 3 --minutes 60

Only the decoder is trained, so a run takes minutes on a CPU, and every method can have several seeds. The maps are
those of the images and of their mirror images; nothing else is drawn but the order. Seeds are gone through one after
the other, in each the methods in the order of --methods. Every finished run goes into the JSON file, with its curve,
and into a folder of save_pretrained; runs in the file are not done again, so the race goes on where it stopped.
`freqfusion test --checkpoint FOLDER` with the same data judges one again.

--tune is for choosing settings: the first half of the training images (in the order of their names, so that CamVid's
drives are cut once) is trained on and the second half judged. The split that is reported stays unseen.

METHOD?OPTION=VALUE&... changes one thing of a method: an argument of the fusion (freqfusion?init=official), or
  lr_factor      of the learning rate of the fusions
  offsets_from   FreqFusion's offset generators rest for this share of the steps
  site           finest or coarsest: the method there alone, bilinear elsewhere
  start          identity: bilinear at first, with gates that training opens, as freqfusion.upgrade_ has them
Networks with one of the last two are not saved.
"""

import argparse
import datetime
import json
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.comparison.race import in_order
from freqfusion.data.transforms import eval_transform
from freqfusion.fusion import FusedFeatures, Fusion, create_fusion, list_fusions
from freqfusion.tasks.image_data import SegmentationData
from freqfusion.tasks.schedule import fusion_parameters
from freqfusion.tasks.semantic import SegmentationModule
from freqfusion.upgrade.base import FusionPoint, FusionSlot
from freqfusion.zoo import ModelSpec

WEIGHTS = {
    "camvid": [0.51, 0.43, 2.14, 0.38, 0.95, 0.62, 3.11, 1.36, 0.83, 2.50, 2.71]
}  # of the recipe camvid/segnext
Maps = dict[str, Any]


class Kept(nn.Module):
    """Stands for the backbone: gives the maps that it was given."""

    def __init__(self, out_channels: list[int]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.maps: list[Tensor] = []

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.maps


class Gated(Fusion):
    """A fusion that gives what bilinear upsampling would until training moves its gates."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__(fusion.hr_channels, fusion.lr_channels)
        point = FusionPoint("", fusion.hr_channels, fusion.lr_channels, "bilinear")
        self.slot = FusionSlot(point, fusion, "identity")

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(None, *self.slot(hr_feat, lr_feat))


def module_of(
    args: argparse.Namespace, data_classes: int, method: str, options: dict[str, Any]
) -> SegmentationModule:
    """The network with its loss and its metrics; the loop here has an optimiser of its own."""
    return SegmentationModule(
        args.network,
        method,
        data_classes,
        network_options={"fusion_options": options} if options else None,
        backbone_weights=args.backbone_weights,
        freeze_backbone=True,
        class_weights=WEIGHTS.get(args.dataset),
        boundary_width=args.boundary_width,
    )


@torch.no_grad()
def compute_maps(args: argparse.Namespace, data: SegmentationData) -> tuple[Maps, Maps]:
    """Maps, masks and mirrored maps, in shared memory: of the images to train on and of those to judge."""
    module = module_of(args, data.num_classes, "nearest", {}).eval()
    transform = eval_transform(module.network.normalisation)

    def part(split: str, mirror: bool) -> Maps:
        samples = [transform(data.sample(split, index)) for index in range(len(data.dataset(split)))]
        images = [sample["image"].as_subclass(Tensor) for sample in samples]
        masks = torch.stack([sample["mask"].as_subclass(Tensor).long() for sample in samples])
        views = [images, [image.flip(-1) for image in images]] if mirror else [images]
        maps = [[module.network.backbone(image[None]) for image in view] for view in views]
        return {
            "maps": [
                [torch.cat(level).share_memory_() for level in zip(*view, strict=True)] for view in maps
            ],
            "masks": masks.share_memory_(),
        }

    train = part(args.train_split, mirror=True)
    if not args.tune:
        return train, part(args.val_split, mirror=False)
    middle = len(train["masks"]) // 2

    def half(images: slice) -> Maps:
        return {
            "maps": [[level[images] for level in view] for view in train["maps"]],
            "masks": train["masks"][images],
        }

    return half(slice(middle)), half(slice(middle, None))


def judge(module: SegmentationModule, kept: Kept, part: Maps, batch: int = 4) -> dict[str, Any]:
    """The figures that ``freqfusion test`` prints, in percent."""
    module.eval()
    masks, maps = part["masks"], part["maps"][0]  # not mirrored
    with torch.no_grad():
        for start in range(0, len(masks), batch):
            kept.maps = [level[start : start + batch] for level in maps]
            mask = masks[start : start + batch]
            image = torch.empty(len(mask), 3, *mask.shape[1:])
            module.metrics.update(module.network(image).argmax(1), mask)
    found = module.metrics.compute()
    module.metrics.reset()
    module.train()
    names = "miou", "boundary_iou", "iou", "boundary_iou_per_class"
    return {name: (100 * found[name].double()).round(decimals=3).tolist() for name in names}


def train(job: tuple[str, int]) -> dict[str, Any]:
    """One run."""
    name, seed = job
    args, (part, val), classes = _given["args"], _given["splits"], _given["classes"]
    spec = ModelSpec.parse(name)
    options = dict(spec.options)
    lr_factor, offsets_from = options.pop("lr_factor", 1), options.pop("offsets_from", 0)
    site, start = options.pop("site", None), options.pop("start", None)
    torch.manual_seed(seed)
    module = module_of(args, classes, spec.name, options).train()
    fusions = next(m.fusions for m in module.network.modules() if hasattr(m, "fusions"))  # coarse to fine
    if site is not None:
        kept_place = {"coarsest": 0, "finest": len(fusions) - 1}[site]
        for place, fusion in enumerate(fusions):
            if place != kept_place:
                fusions[place] = create_fusion("bilinear", fusion.hr_channels, fusion.lr_channels)
    if start is not None:
        if start != "identity":
            raise ValueError(f"start must be identity, got {start}")
        for place, fusion in enumerate(fusions):
            fusions[place] = Gated(fusion)
    backbone = module.network.backbone
    kept = module.network.backbone = Kept(backbone.out_channels)
    count = len(part["masks"])
    steps = args.epochs * (count // args.batch)
    of_fusions = fusion_parameters(module.network)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in module.network.parameters() if (p in of_fusions) == fused]}
        for fused in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01)
    rates = [args.lr, args.lr * lr_factor]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    offsets = [p for fusion in fusions if offsets_from for p in fusion.dysampler.parameters()]
    order = torch.Generator().manual_seed(seed)
    curve, losses, seconds, step = [], [], 0.0, 0
    for epoch in range(1, args.epochs + 1):
        since = time.perf_counter()
        for indices in torch.randperm(count, generator=order).split(args.batch):
            if len(indices) < args.batch:
                break
            mirrored = torch.rand(len(indices), generator=order) < 0.5
            kept.maps = [
                torch.stack([pair[int(flip)][index] for index, flip in zip(indices, mirrored, strict=True)])
                for pair in zip(*part["maps"], strict=True)
            ]
            mask = part["masks"][indices]
            mask = torch.where(mirrored[:, None, None], mask.flip(-1), mask)
            loss = module.network.loss(torch.empty(len(mask), 3, *mask.shape[1:]), mask, module.loss)
            optimizer.zero_grad()
            loss.backward()
            for parameter in offsets if step < offsets_from * steps else ():
                parameter.grad = None  # so that AdamW leaves it
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step += 1
        seconds += time.perf_counter() - since
        if epoch % max(1, args.epochs // 5) == 0:
            found = judge(module, kept, val)
            curve.append([step, found["miou"], found["boundary_iou"]])
    row = {
        "method": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "steps": steps,
        "step_seconds": round(seconds / steps, 4),
        "last_losses": round(sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :]), 4),
        "curve": curve,
        **judge(module, kept, val),
    }
    module.network.backbone = backbone
    if site is None and start is None:
        freqfusion.save_pretrained(module.network, args.out / f"{name.replace('?', '-')}-{seed}")
    return row


_given: dict[str, Any] = {}


def start_worker(args: argparse.Namespace, splits: tuple[Maps, Maps], classes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops them
    torch.set_num_threads(1)
    _given.update(args=args, splits=splits, classes=classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="a semantic data set, as in --data.dataset of freqfusion fit")
    parser.add_argument("--root", required=True)
    parser.add_argument("--dataset-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--val-split", default="val", help="judged; choose settings on another")
    parser.add_argument(
        "--tune", action="store_true", help="train on half of the training images, judge the others"
    )
    parser.add_argument("--resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), required=True)
    parser.add_argument("--network", default="fpn_tf_efficientnet_lite0?channels=64")
    parser.add_argument("--backbone-weights", default="package:efficientnet_lite0")
    parser.add_argument("--methods", nargs="+", default=in_order(list_fusions()))
    parser.add_argument("--seeds", type=int, default=1, help="so many, from 0 on [1]")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--boundary-width", type=int, default=2, help="pixels")
    parser.add_argument(
        "--workers", type=int, default=max(1, len(os.sched_getaffinity(0))), help="runs at once"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/frozen"), help="folder of the trained networks"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON file that is gone on with")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes

    ignored = {"methods", "seeds", "workers", "minutes", "out", "results", "root"}
    settings = {name: value for name, value in vars(args).items() if name not in ignored}
    content: dict[str, Any] = {"settings": settings, "runs": []}
    if args.results.is_file():
        content = json.loads(args.results.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise SystemExit(f"{args.results} has runs of other settings: {content['settings']}")
    done = {(run["method"], run["seed"]) for run in content["runs"]}
    jobs = [(m, s) for s in range(args.seeds) for m in args.methods if (m, s) not in done]
    data = SegmentationData(
        args.dataset, root=args.root, dataset_options=args.dataset_options, resize=args.resize
    )
    given = args, compute_maps(args, data), data.num_classes
    args.results.parent.mkdir(parents=True, exist_ok=True)
    waiting = iter(jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the workers end too
    with mp.get_context("spawn").Pool(args.workers, start_worker, given) as pool:
        running = [pool.apply_async(train, (job,)) for job in islice(waiting, args.workers)]
        while running:
            ready = [result for result in running if result.ready()]
            for result in ready:
                row = {**result.get(), "date": str(datetime.date.today())}
                if args.results.is_file():  # another race may have written to it
                    content = json.loads(args.results.read_text(encoding="utf-8"))
                content["runs"].append(row)
                write_atomically(args.results, (json.dumps(content, indent=1) + "\n").encode())
                said = {
                    name: row[name] for name in ("method", "seed", "miou", "boundary_iou", "step_seconds")
                }
                print(said, [point[1] for point in row["curve"]], flush=True)
                running.remove(result)
                job = next(waiting, None) if time.monotonic() < end else None
                if job is not None:
                    running.append(pool.apply_async(train, (job,)))
            time.sleep(0.2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same line goes on with the runs that are missing") from None
