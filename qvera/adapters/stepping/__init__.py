"""What methods do between optimizer steps: new places for sparse changes, and optimizers that know of them."""
