"""What two or more sections of the paper share: models, data, the training loop, runs. Imports no section."""
