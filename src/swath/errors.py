"""Errors at the public door: they name the argument, what was wanted and what came."""


def bad_value(argument: str, wanted: str, got: object) -> ValueError:
    """A ValueError for an argument of the right type with a value that cannot work."""
    return ValueError(f"{argument}: wanted {wanted}, got {got}")


def bad_type(argument: str, wanted: str, got: object) -> TypeError:
    """A TypeError for an argument (or the dtype of a tensor) of the wrong kind."""
    return TypeError(f"{argument}: wanted {wanted}, got {got}")
