"""Retraining: masks, their policies, distillation, and what carries them through transformers' Trainer."""
