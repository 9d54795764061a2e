"""`qvera schema`."""

import json


def schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Editors that know yaml-language-server complete and check a recipe whose first line names the schema: `#
    yaml-language-server: $schema=FILE`.

    Example:
        qvera schema > recipe.schema.json
    """
    from qvera.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
