event.preventDefault();
const own = HTMLInputElement.prototype.click;
let input;
HTMLInputElement.prototype.click = function () { input = this; };
try { this.closest('.widget-hbox').querySelector('.widget-upload').click(); }
finally { HTMLInputElement.prototype.click = own; }
input.files = event.dataTransfer.files;
input.dispatchEvent(new Event('change'));
