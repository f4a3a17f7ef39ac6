"""Parameter groups and schedules: what the optimiser steps with, and how far."""
