"""Compare fine-tuning methods: every base x method x task is one training job in one folder, and a report reads them."""
