"""Reading configurations of mergekit (https://github.com/arcee-ai/mergekit), version 0.1.5."""
