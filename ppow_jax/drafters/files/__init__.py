"""Drafters as servers read them: `config.json` and safetensors of EAGLE-3, in and out."""
