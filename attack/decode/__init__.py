"""Byte streams -> protocol events -> observations, sans-IO. One error class comes out: `attack.errors.DecodeError`."""
