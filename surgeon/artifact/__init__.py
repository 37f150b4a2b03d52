"""The Triton artifact: a model as a folder that runs on a GPU without transformers and without a compiler."""
