"""verl 0.9.1: data, rollout, training engine and trainer of LA-DAPO."""
