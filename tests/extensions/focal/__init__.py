"""An algorithm of one's own: the focal loss (Lin et al., 2017) in supervised fine-tuning."""
