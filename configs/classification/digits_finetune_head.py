"""Fine-tuning, step 1: trains a new `fc` for unseen classes on a frozen pretrained backbone.

The backbone is pretrained on the digits 0 to 4:

    resbackbone train configs/classification/digits_resnet18.py --work-dir work_dirs/digits_0to4 --cfg-options \
        model.num_classes=5 train_dataloader.dataset.classes=[0,1,2,3,4] val_dataloader.dataset.classes=[0,1,2,3,4]
"""

_base_ = ["digits_resnet18.py"]

classes = ["5", "6", "7", "8", "9"]

model = dict(
    backbone=dict(
        frozen_stages=4,  # all stages, including their norms' statistics
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/digits_0to4/epoch_20.pth"),
    ),
    num_classes=5,
)
train_dataloader = dict(dataset=dict(classes=classes))
val_dataloader = dict(dataset=dict(classes=classes))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.5, weight_decay=0))
param_scheduler = [dict(type="CosineAnnealingLR", begin=0, end=20, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=20)
