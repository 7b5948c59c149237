import os

# loguru, which datatrove logs through, otherwise writes the values of local variables into its logs when something
# fails: pictures, prompts, keys. Read when loguru is first imported, so it is set before any module here imports it.
os.environ["LOGURU_DIAGNOSE"] = "NO"
