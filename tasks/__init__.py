"""Tasks for seqio: `softprompt.tasks.registry` registers them; `records` needs no seqio."""
