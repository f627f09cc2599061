"""Capture file -> packets -> ordered byte streams, with explicit holes. Knows TCP; nothing of what the bytes mean."""
