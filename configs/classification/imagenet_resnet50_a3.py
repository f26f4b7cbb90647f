"""ResNet-50 on ImageNet-1k with procedure A3 of ResNet strikes back: 100 epochs at 160 pixels, 78.1% published.

For 8 GPUs with 256 images each; otherwise keep the total batch size of 2048, or scale the learning rate with its
square root.

    torchrun --nproc-per-node 8 -m resbackbone train configs/classification/imagenet_resnet50_a3.py --launcher pytorch

Source: Wightman, Touvron and Jegou, ResNet strikes back: An improved training procedure in timm, arXiv:2110.00476,
table 2.
"""

_base_ = ["_base_.py"]

model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet", depth=50),
    num_classes=1000,
    loss=dict(type="BinaryCrossEntropy", threshold=0.2),  # a mixed image has both classes as targets
    mixup_cutmix=dict(mixup_alpha=0.1, cutmix_alpha=1.0),
)

train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="EpochSampler"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        root="data/imagenet/train",
        transforms=[
            dict(type="RandomResizedCrop", size=160, interpolation="bicubic"),
            dict(type="RandomHorizontalFlip"),
            dict(type="RandAugment", num_ops=2, magnitude=6, magnitude_std=0.5),
        ],
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        root="data/imagenet/val",
        transforms=[
            dict(type="Resize", size=236, interpolation="bicubic"),  # crop ratio 0.95
            dict(type="CenterCrop", size=224),
        ],
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="LAMB", lr=8e-3, weight_decay=0.02),
    clip_grad=dict(max_norm=1.0),  # part of the paper's LAMB
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
env_cfg = dict(cudnn_benchmark=True)
