"""A narrow ResNet-18 for small images on scikit-learn's handwritten digits; trains in two minutes on two CPU cores."""

_base_ = ["_base_.py"]

model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet_CIFAR", depth=18, in_channels=1, stem_channels=16, base_channels=16),
    num_classes=10,
    loss=dict(type="CrossEntropy", label_smoothing=0.1),
)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,  # reading pictures of 8x8 pixels is faster than sending them between processes
    sampler=dict(type="EpochSampler"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        root="data/digits/train",
        channels=1,
        transforms=[dict(type="Resize", size=16), dict(type="RandomCrop", size=16, padding=2)],
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolder", root="data/digits/val", channels=1, transforms=[dict(type="Resize", size=16)]),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=23),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, end=20, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=20)
default_hooks = dict(logger=dict(interval=10))
