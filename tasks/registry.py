"""Importing this module registers every task with seqio, whatever was imported or parsed before."""

from softprompt.tasks import glue, super_glue, text  # noqa: F401
