"""The error of unreadable checkpoint files, and texts that several readers share."""

CUT_OFF = "is cut off in the middle; download or copy it again"
ADVICE = (
    "nothing was run. If you trust its author, load it in the program that wrote it, and save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pth')"
)


class UnreadableError(ValueError):
    """The reason why a file cannot be read, worded to follow its name: "is empty; download it again"."""
