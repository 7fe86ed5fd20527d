"""LA-DAPO apart from any host: settings and samples. `verl` and `easyr1` are its two hosts."""
