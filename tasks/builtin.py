"""Importing this module defines every task that the package brings: see `catalogue`."""

from softprompt.tasks import glue, super_glue, text  # noqa: F401
