"""`python -m finetune.serve`: a `finetune.worker` that imports without looking for garbage, nor ever through that.

Looking through the libraries' million objects takes 13 % of the seconds that importing them does, and half a second at
the end of every training.
"""

import gc


def main() -> None:
    """Import, then serve."""
    gc.disable()
    from finetune import worker

    gc.freeze()
    gc.enable()
    worker.main()


if __name__ == "__main__":
    main()
