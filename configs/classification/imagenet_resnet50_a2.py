"""ResNet-50 on ImageNet-1k with procedure A2 of ResNet strikes back: 300 epochs at 224 pixels, 79.8% published.

Inherits from A3; for 8 GPUs with 256 images each.
"""

_base_ = ["imagenet_resnet50_a3.py"]

model = dict(backbone=dict(drop_path_rate=0.05))
train_dataloader = dict(
    sampler=dict(num_repeats=3),  # repeated augmentation
    dataset=dict(
        transforms=[
            dict(type="RandomResizedCrop", size=224, interpolation="bicubic"),
            dict(type="RandomHorizontalFlip"),
            dict(type="RandAugment", num_ops=2, magnitude=7, magnitude_std=0.5),
        ],
    ),
)
optim_wrapper = dict(optimizer=dict(lr=5e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
