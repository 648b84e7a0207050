"""Answer people: a checkpoint and a prompt with media → text, and drawings where the answer asks for them.

    command line or terminal ──chat──▶ parts ──conversation──▶ pieces of the answer ──▶ terminal, or ──draw──▶ PNG files

1. `conversation`: the history, the media of the next question, its answer as a stream. Read it first.
2. `chat`: the program: one prompt from the command line or a pipe, or a conversation on a terminal.
3. `draw`: the text-to-image pipeline behind ``<h>…</h>`` in an answer.
"""
