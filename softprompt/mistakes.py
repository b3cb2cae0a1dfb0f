"""What a user is told of an error, in a sentence, and the exit code that goes with it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing is saved on it."""


def told(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the code; None for a fault of ours, whose traceback is wanted.

    2 is for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM.
    """
    if isinstance(error, Terminated):
        return "stopped by SIGTERM", 143
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ValueError):
        return str(error).replace("--gin.IGNORE_FINGERPRINT: ", "--ignore_fingerprint: "), 2
    # Of files that a user named: the modules name what is wrong with all others.
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename!r}: {error.strerror}", 2
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"the memory of the devices does not suffice ({str(error).splitlines()[0]}); "
            f"`softprompt train … --dry_run` says what a run needs, and what fits",
            2,
        )
    return None
