"""What goes wrong with a model's folder or with a request, in words; deployed with the programs that raise it."""


class ModelError(Exception):
    """The model's folder is not what it should be, or the request is not; the message says what and where."""


class DeviceError(ModelError):
    """A device does not take what is written to it, and perhaps nothing more."""


def brief(error: BaseException) -> str:
    """The first line of what another library says."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."
