"""Ways to tune a base: the `Method` contract, and the methods that PEFT lacks."""
