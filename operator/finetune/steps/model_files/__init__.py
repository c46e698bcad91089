"""The files of a checkpoint as Hugging Face lays them out: safetensors, their index, config.json, an adapter's. Without
torch: they are read, copied and written as bytes."""
