"""Readers of other people's formats, a file each: its records → samples → `anymal.data_prep.write`.

`llava`: LLaVA-style JSON or JSON Lines, and its folder of images.
"""
