"""The Celery app of workers, beat and Flower, and its tasks of a few lines."""
