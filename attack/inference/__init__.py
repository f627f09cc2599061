"""Which update rule a job has, where nobody declares it: inferred from its traffic, or said to be unknown."""
