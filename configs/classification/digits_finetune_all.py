"""Fine-tuning, step 2: trains all layers, with learning rates that decrease towards the stem."""

_base_ = ["digits_finetune_head.py"]

model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
load_from = "work_dirs/digits_finetune_head/epoch_20.pth"  # backbone and `fc`

optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(lr=0.02, weight_decay=5e-4),
    paramwise_cfg=dict(layer_decay=0.7),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=12),
    dict(type="CosineAnnealingLR", begin=1, end=10, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=10)
