"""Training for every app: the LightningModule, optimizers, checkpoints, exact resume and the folder of a run."""
