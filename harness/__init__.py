"""The honest side: all that a rank does before its bytes leave it. Knows nothing of who listens."""
