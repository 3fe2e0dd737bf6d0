"""Tokenizers that others trained, as exports: names mapped, nothing of theirs executed. A module for each family."""

FAMILIES = {
    "dqvae": "DQ-VAE: the authors' Lightning checkpoint (two or three grains)",
    "vqgan": "VQGAN of taming-transformers, also inside one of their transformers",
    "llamagen": "LlamaGen's VQ-16 and VQ-8",
    "maskgit": "MaskGIT's VQGAN in the PyTorch form of 1d-tokenizer",
    "magvit2": "Open-MAGVIT2's tokenizer",
    "diffusers": "a folder of a diffusers VQModel: config.json and safetensors",
}
