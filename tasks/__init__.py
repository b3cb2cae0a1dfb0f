"""Tasks for seqio. Import `softprompt.tasks.registry` to register them; `records` needs no seqio."""
