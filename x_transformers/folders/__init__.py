"""Folders of models: `config.json` and safetensors files, of this library and of others."""
