const t = this.parentNode.parentNode.querySelector('pre'), r = document.createRange(), s = getSelection();
r.selectNodeContents(t); s.removeAllRanges(); s.addRange(r);
this.textContent = document.execCommand('copy') ? 'Copied' : 'Selected: press Ctrl+C';
