"""Answer a prompt with media; or, without a prompt, converse.

    anymal chat checkpoint=runs/demo/finetune --image a.jpg --audio b.wav "What do you see and hear?"
    anymal chat checkpoint=runs/demo/finetune "Which is louder," --audio a.wav "or" --audio b.wav "?"
    echo "What is this?" | anymal chat checkpoint=runs/demo/finetune --image a.jpg
    anymal chat checkpoint=runs/demo/finetune
    anymal chat checkpoint=runs/mmit-lora draw=stabilityai/stable-diffusion-xl-base-1.0 "Draw me a cat."

The LLM reads texts and media in the order in which they are given. `--NAME FILE` is a medium of modality NAME; what has
the form name=value is a setting; everything else is text. Without a text, standard input is the text, where it is a
pipe or a file: any text can be given there, also one that looks like a setting. Media alone are a prompt, too. Where
there is neither text nor medium, it converses: /help says how.

With `draw`, what the answer holds between <h> and </h> is drawn (docs/evaluation.md says how a model learns that). An
LLM or encoder that was moved since the training is named anew: model.llm.name=FOLDER,
model.modalities.image.encoder=FOLDER.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.launch.registry import registry
    from anymal.serving.chat import main

    run_program(lambda: main(__doc__, registry()))


if __name__ == "__main__":
    start()
