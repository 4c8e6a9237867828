"""Names of the classes of the data sets that published models were trained on, by label, and a form of names that can
be drawn. Needs nothing."""

_ADE20K = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, "
    "earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, "
    "mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, "
    "base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, "
    "refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, "
    "river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, "
    "palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, "
    "truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, "
    "pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, "
    "conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, "
    "bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, "
    "lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, "
    "pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"
)
_COCO_THINGS = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop "
    "sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, "
    "umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball "
    "glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
_COCO_STUFF = (
    "banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit, gravel, "
    "house, light, mirror-stuff, net, pillow, platform, playingfield, railroad, river, road, roof, sand, sea, "
    "shelf, snow, stairs, tent, towel, wall-brick, wall-stone, wall-tile, wall-wood, water-other, "
    "window-blind, window-other, tree-merged, fence-merged, ceiling-merged, sky-other-merged, cabinet-merged, "
    "table-merged, floor-other-merged, pavement-merged, mountain-merged, grass-merged, dirt-merged, "
    "paper-merged, food-other-merged, building-other-merged, rock-merged, wall-other-merged, rug-merged"
)

ADE20K = tuple(_ADE20K.split(", "))
"""The 150 of the scene parsing benchmark: the first synonyms of its list."""
COCO_THINGS = tuple(_COCO_THINGS.split(", "))
"""The 80 kinds of objects."""
COCO_PANOPTIC = (*COCO_THINGS, *_COCO_STUFF.split(", "))
"""The 80 things and, after them, 53 kinds of stuff."""

CITYSCAPES_LABELS = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
"""(label id, name, colour) of the classes that are scored, in the order of their train ids (Cordts et al., "The
Cityscapes dataset for semantic urban scene understanding", CVPR 2016, and the benchmark's label table)."""
CITYSCAPES = tuple(name for _, name, _ in CITYSCAPES_LABELS)
"""The 19 by train id."""
