"""Faster R-CNN with FreqFusion in its feature pyramid, as a config of mmdetection 3.

Add the line of the detector that you start from, which needs mmdet,

    _base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

and train with mmdetection's own tools. Other methods: {"type": "CARAFE"}, {"type": "DySample+"}, ...
"""

custom_imports = {"imports": ["freqfusion.upgrade.hosts.mm"]}

model = {
    "neck": {
        "_delete_": True,  # the options of the FPN that stood here
        "type": "FreqFusionFPN",
        "in_channels": [256, 512, 1024, 2048],
        "out_channels": 256,
        "num_outs": 5,
        "upsample_cfg": {"type": "FreqFusion", "compressed_channels": 64},
    }
}
