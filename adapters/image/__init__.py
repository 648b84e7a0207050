"""Images: a picture's bytes → pixels → patch features of one frozen vision encoder, or of several.

    bytes ──read──▶ picture ──image processor──▶ uint8 ──lookup──▶ pixels ──one encoder──▶ features       modality
                       └──────square──▶ uint8 ──each encoder's pixels──▶ features, joined                mixture

1. `read`: bytes → picture, within bounds: what a stranger's file may cost is bounded there.
2. `modality`: one encoder with its options and its decoding. Read it first. `tiles`: a large picture as several views.
3. `lookup`: pixels travel as bytes. `layers`: of a network only the layers up to the wanted one run.
4. `mixture`: a composition of encoders, a tree of ``channels`` and ``append``. `pictures`: the square that all its
   encoders are fed from. `backbone`: one encoder of the tree.
"""
