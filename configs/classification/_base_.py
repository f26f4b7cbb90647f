"""Base config of the image-classification recipes."""

default_scope = "resbackbone"
custom_imports = dict(imports=["resbackbone.training.classification"])

train_cfg = dict(type="ResumableTrainLoop", max_epochs=100)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator

default_hooks = dict(
    checkpoint=dict(type="ResumableCheckpointHook", interval=1, max_keep_ckpts=2, save_best="accuracy/top1"),
    logger=dict(type="LoggerHook", interval=50),
)
custom_hooks = [
    dict(type="ClassCheckHook"),
    dict(type="FiniteLossHook"),
    dict(type="SyncBatchNormHook"),  # plain batch norms on a single process
    dict(type="CurvesHook"),
]
# For TensorBoard: pip install 'resbackbone[train]' and add dict(type="TensorboardVisBackend").
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
randomness = dict(seed=0)
