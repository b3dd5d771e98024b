"""Compare fine-tuning methods: every base x method x task is one training job in one folder; a report reads them."""
