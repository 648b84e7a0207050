"""Answer people: a checkpoint and a prompt with media → text, and drawings where the answer asks for them.

`chat` is the program, `conversation` what it says next, `draw` the text-to-image pipeline behind ``<h>…</h>``.
"""
