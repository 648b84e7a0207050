"""Readers of other people's formats, a file each."""
