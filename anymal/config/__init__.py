"""Every setting of a run and its default; how recipes and the command line change them.

    defaults (schema) ◀── recipe.yaml ◀── name=value … ──settings──▶ a checked `Config` ──stages──▶ one for each stage

1. `schema`: dataclasses, one home for each setting, its meaning under the field. Read it first.
2. `settings`: a recipe (a file, or the name of one that comes with the package) and overrides → dataclasses, checked by
   OmegaConf, frozen; back to YAML, without secrets.
3. `renamed`: settings that have another name by now; the old one still loads, with a warning.
4. `stages`: a recipe that lists stages → the settings of each.
5. `command_line`: ``[RECIPE or SOURCE] name=value …`` → the above; ``--help``; how every program begins and ends.
"""
