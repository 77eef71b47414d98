"""Building blocks of the built-in rewards: CLIP, vision-language models, pinned weights."""
