"""What built-in rewards are made of: CLIP, vision-language models, pinned weights."""
