"""What goes wrong with a model's folder or with a request, in words; deployed with the programs that raise it."""


class ModelError(Exception):
    """The model's folder is not what it should be, or the request is not; the message says what and where."""
