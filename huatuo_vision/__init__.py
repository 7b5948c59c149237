"""Training and judging medical vision-language models: recipes in, plain LLaVA checkpoints and honest numbers out."""

import logging

# bitsandbytes reports at every import on a CPU that an optional kernel can't be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
